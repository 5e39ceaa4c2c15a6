"""From run folders to tables, figures and report pages; reads what runs wrote and changes nothing."""
