"""The paper's experiments on data that scikit-learn bundles, and open questions; see README.md."""
