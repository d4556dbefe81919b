"""The files from which a run resumes."""
