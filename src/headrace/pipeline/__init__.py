"""From waiting requests to answers: batch, launch on a lane, finish. Stages decide by pure rules and hand on whole batches."""
