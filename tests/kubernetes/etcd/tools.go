//go:build tools

// Package tools imports the server of etcd. It is a separate module, because etcd and Kubernetes need different
// versions of their dependencies.
package tools

import _ "go.etcd.io/etcd/server/v3"
