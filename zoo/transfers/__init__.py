"""Transfer methods, one file each; `zoo.transfers.objective` is what they are made of."""
