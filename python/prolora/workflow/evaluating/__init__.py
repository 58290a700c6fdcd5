"""The parts of an evaluation: what is drawn, what judges it, and what follows."""
