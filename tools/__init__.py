"""Run by hand, seldom: what makes numbers that are committed from sources that are not."""
