"""Commands that explain what names and rules do, and why: trace, check, top, wait."""
