"""Pages in a browser: agents that talk, experts that remember, sessions, and what is stored.

A page is a function of the module `streamlit`, which is needed only where the pages are shown.
"""
