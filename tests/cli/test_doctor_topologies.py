"""`doctor` where several servers hold a namespace: sentinels, a Redis Cluster, several members of etcd."""
