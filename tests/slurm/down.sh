#!/usr/bin/env bash
# End what up.sh started in FOLDER: its jobs first, then its daemons, by their pid files. FOLDER stays.
BASE=${1:?usage: down.sh FOLDER}
export SLURM_CONF=$BASE/slurm.conf
jobs=$(timeout 5 squeue -h -o %A 2>/dev/null) && [ -n "$jobs" ] && timeout 5 scancel --full --signal=KILL $jobs
pids=$(cat "$BASE"/run/{slurmctld,slurmd.*,munged}.pid 2>/dev/null)
[ -n "$pids" ] && kill $pids 2>/dev/null
for _ in $(seq 100); do
  kill -0 $pids 2>/dev/null || exit 0   # true while one of them is there
  sleep .1
done
kill -KILL $pids
