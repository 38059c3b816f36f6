"""What the two reproductions share: data sets, the ledger's losses, the experiments, the page of
figures."""
