"""What a device does beside what kvc8 assumes: probes, each a process of its own, and a report."""
