"""What each file format needs beside the updates: fused groups, PEFT configurations, metadata."""
