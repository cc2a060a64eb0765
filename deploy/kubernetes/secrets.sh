#!/bin/bash
# Print the secrets of a new install, with passwords that nobody has seen. Pipe it, so that they are written nowhere else:
#   deploy/kubernetes/secrets.sh trip_fare | kubectl create -f -
# The argument is the registered model whose service the connection bentoml_default leads to; without one, trip_fare.
# "create" on purpose: it leaves alone what is there. A second set of passwords would open neither the databases nor what
# Airflow has encrypted.
set -euo pipefail

model=${1:-trip_fare}
namespace=mlops steps=mlops-steps models=mlops-models
# Host and port of the databases, by a name that steps in their namespace find as well.
postgres=postgres.$namespace.svc:5432

# The name that DeployToKubernetesOperator gives a model's objects: what is no name in Kubernetes, or could be taken for another
# model's, gets the first digits of its SHA-256.
object_name() {
  local plain
  plain=$(printf %s "$1" | LC_ALL=C tr 'A-Z' 'a-z' | LC_ALL=C tr -cs 'a-z0-9' '-' | sed 's/^-//' | cut -c 1-40 | sed 's/-$//')
  if [[ $plain != "$1" || $plain =~ -[0-9a-f]{6}$ ]]; then
    plain=${plain:+$plain-}$(printf %s "$1" | openssl dgst -sha256 -r | cut -c 1-6)
  fi
  printf 'model-%s' "$plain"
}
endpoint=$(object_name "$model").$models.svc

password() { openssl rand -hex 24; }
admin=$(password) airflow=$(password) mlflow=$(password) ledger=$(password)

secret() {
  printf -- '---\napiVersion: v1\nkind: Secret\nmetadata:\n  name: %s\n  namespace: %s\ntype: Opaque\nstringData:\n' "$1" "$namespace"
}

secret postgres
cat <<YAML
  postgres-password: "$admin"
  airflow-password: "$airflow"
  mlflow-password: "$mlflow"
  ledger-password: "$ledger"
YAML

secret mlflow
cat <<YAML
  backend-store-uri: "postgresql+psycopg2://mlflow:$mlflow@$postgres/mlflow"
YAML

secret airflow-metadata
cat <<YAML
  connection: "postgresql+psycopg2://airflow:$airflow@$postgres/airflow"
YAML

secret airflow-keys
cat <<YAML
  fernet-key: "$(openssl rand -base64 32 | tr '+/' '-_')"
  api-secret-key: "$(openssl rand -hex 32)"
  jwt-secret: "$(openssl rand -hex 64)"
YAML

secret airflow-users
cat <<YAML
  passwords.json: '{"admin": "$(password)"}'
YAML

# Each key becomes a variable of Airflow's containers, and so a connection. Signing keys: add AIRFLOW_CONN_SIGNING_DEFAULT.
secret airflow-connections
cat <<YAML
  AIRFLOW_CONN_MLFLOW_DEFAULT: '{"conn_type": "mlflow", "host": "mlflow.$namespace.svc", "port": 5000, "schema": "http"}'
  AIRFLOW_CONN_LEDGER_DEFAULT: '{"conn_type": "mlops_ledger", "extra": {"url": "postgresql+psycopg2://ledger:$ledger@$postgres/ledger"}}'
  AIRFLOW_CONN_BENTOML_DEFAULT: '{"conn_type": "bentoml", "host": "$endpoint", "port": 80, "schema": "http", "password": "$(password)"}'
  AIRFLOW_CONN_KUBERNETES_DEFAULT: '{"conn_type": "kubernetes", "extra": {"in_cluster": true, "namespace": "$steps"}}'
YAML
