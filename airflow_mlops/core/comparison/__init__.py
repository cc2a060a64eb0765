"""Which of two models is better: metrics, intervals, paired tests, slices, fairness."""
