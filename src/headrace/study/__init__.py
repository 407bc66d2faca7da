"""What is done with many runs: plan and make them, table them, compare them, judge the published claims by them."""
