"""Many replicas: which adapters go to which GPU, and how few GPUs there can be."""
