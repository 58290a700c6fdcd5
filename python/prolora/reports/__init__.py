"""Documents that know no verb, and their pages."""
