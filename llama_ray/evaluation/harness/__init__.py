"""Tasks of lm-evaluation-harness. Only this folder imports lm_eval, which takes seconds: import it where it is used."""
