"""lifecycle -> driver -> agent -> worker: who runs where, and what happens when something dies."""
