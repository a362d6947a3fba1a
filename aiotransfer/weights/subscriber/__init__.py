"""An inference rank: its memory, its readers, and how it comes by versions."""
