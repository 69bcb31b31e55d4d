"""Campaigns: very many cases of the model against its judges, on the processes of this machine or on a Dask cluster.

- `plan`: what a campaign consists of; `translations`, `comparisons`, `schedules`: the three sorts of work.
- `work`: what a worker does; `workers`: a process pool or a cluster; `drive`: hands out, and again what was lost.
- `store`: the SQLite file that only the coordinator writes; `report`: its totals and findings.
"""
