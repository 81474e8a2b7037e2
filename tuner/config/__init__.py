"""What a user asks for: the search space, prompts, limits and options, checked before anything is loaded."""
