"""Everything that touches DeepSpeed or a process group."""
