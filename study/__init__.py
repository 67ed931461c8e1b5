"""Tables, figures and recorded results of the study and its book; no part of the package."""
