"""Many runs: sweeps, and the comparison of runs."""
