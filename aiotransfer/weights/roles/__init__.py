"""What publishers and subscribers are made of: messages, peers that are watched, writes and reads."""
