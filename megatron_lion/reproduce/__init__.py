"""The paper's artefacts: how to make each, what the paper says, and what came out here."""
