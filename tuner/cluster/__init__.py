"""Studies on several GPUs and machines: workers, who gets which job, sweeps of studies."""
