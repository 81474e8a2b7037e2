"""What to try next: Optuna by ask and tell, in this process or in one of its own."""
