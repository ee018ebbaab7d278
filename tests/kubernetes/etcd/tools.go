//go:build tools

// Package tools names etcd's server, which has a module of its own: its dependencies are not those of Kubernetes.
package tools

import _ "go.etcd.io/etcd/server/v3"
