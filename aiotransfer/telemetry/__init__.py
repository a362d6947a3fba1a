"""What hosts see of the components: records of what is over, handed on, as metrics and as spans."""
