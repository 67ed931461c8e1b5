"""What only the study and its book need: a module a chapter, figures and recorded results."""
