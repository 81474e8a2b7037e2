"""What lies below models and sampler alike: noise by key, the attention kernels, the static key-value cache."""
