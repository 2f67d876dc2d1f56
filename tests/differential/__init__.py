"""The random differential tester: configurations are sampled, trained by two algorithms, compared and made small."""
