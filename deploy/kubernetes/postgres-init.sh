#!/bin/bash
# Run once by the Postgres image, on an empty volume: a role and a database each, which the two others may not enter.
set -eu
for name in airflow mlflow ledger; do
  variable="${name^^}_PASSWORD"
  # psql reads the password from its environment: arguments are anybody's to see.
  PASSWORD="${!variable}" psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --set name="$name" \
    --username "${POSTGRES_USER:-postgres}" --dbname postgres <<'SQL'
\getenv password PASSWORD
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done
