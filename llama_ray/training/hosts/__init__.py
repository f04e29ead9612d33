"""What workers settle over their hosts' network and memory, beside the process group that trains."""
