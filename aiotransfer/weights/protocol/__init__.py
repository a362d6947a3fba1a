"""What publishers and subscribers say to each other, and the rules that they follow. Pure: no clock, no input
or output."""
