"""What to try next: Optuna's ask and tell, in this process or a separate one."""
