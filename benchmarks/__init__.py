"""Side-by-side measurements. Every figure is a ratio taken in one run; none of them is a test."""
