"""From waiting requests to answers: batch, launch on a lane, finish."""
