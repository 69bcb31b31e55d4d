// Leaves EL0 by SVC #42.
        svc     #42
