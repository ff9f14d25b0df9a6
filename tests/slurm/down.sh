#!/usr/bin/env bash
# End what up.sh started in FOLDER: its jobs first, then its daemons, by their pid files. FOLDER stays.
BASE=${1:?usage: down.sh FOLDER}
export SLURM_CONF=$BASE/slurm.conf
jobs=$(timeout 5 squeue -h -o %A 2>/dev/null) && [ -n "$jobs" ] && timeout 5 scancel --full --signal=KILL $jobs
for name in slurmctld "slurmd.*" munged; do
  for pid in $(cat "$BASE"/run/$name.pid 2>/dev/null); do
    kill "$pid" 2>/dev/null
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep .1; done
  done
done
exit 0
