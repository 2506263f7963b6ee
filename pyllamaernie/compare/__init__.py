"""Models side by side on the same text and pictures: runs, divergence, the table and its picture."""
