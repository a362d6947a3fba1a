"""All ranks as one of them sees them: how they meet, what they tell each other, and how one is lost."""
