"""What callers ask for: prompt files, requests and seeds, and GenEval's rules for what an image must show."""
