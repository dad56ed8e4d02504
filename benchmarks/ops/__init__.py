"""One module per op, `bench_<op>`: its cases, its peers, the work it counts and the check that comes before timing."""
