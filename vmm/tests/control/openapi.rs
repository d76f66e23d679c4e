//! `docs/openapi.yaml` against the running server: every operation of the file is called, every answer is one that the file allows,
//! and the server has no operation that the file lacks.

use std::collections::BTreeSet;

use bytes::Bytes;
use hyper::{Method, Response};
use serde_json::{Value, json};
use vmm::control::client::Client;
use vmm::control::server::ROUTES;

use crate::harness::Place;

const METHODS: [&str; 7] = ["get", "put", "post", "delete", "patch", "head", "options"];

/// The file, and which of its operations and answers have been seen.
struct Specification {
    document: Value,
    seen: BTreeSet<(String, String, u16)>,
}

impl Specification {
    fn load() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.yaml");
        let text = std::fs::read_to_string(path).unwrap();
        Self { document: serde_yaml_ng::from_str(&text).unwrap(), seen: BTreeSet::new() }
    }

    fn operations(&self) -> BTreeSet<(String, String)> {
        let paths = self.document["paths"].as_object().unwrap();
        let of_path = |(path, item): (&String, &Value)| {
            let methods = item.as_object().unwrap().keys().filter(|key| METHODS.contains(&key.as_str()));
            methods.map(|method| (method.to_uppercase(), path.clone())).collect::<Vec<_>>()
        };
        paths.iter().flat_map(of_path).collect()
    }

    fn follow<'a>(&'a self, value: &'a Value) -> &'a Value {
        match value.get("$ref").and_then(Value::as_str) {
            Some(reference) => self.document.pointer(reference.strip_prefix('#').unwrap()).unwrap(),
            None => value,
        }
    }

    fn validate(&self, schema: &Value, instance: &Value, what: &str) {
        let root = json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "components": self.document["components"],
            "allOf": [schema],
        });
        let validator = jsonschema::validator_for(&root).unwrap_or_else(|error| panic!("{what}: {error}"));
        let errors: Vec<String> =
            validator.iter_errors(instance).map(|e| format!("{}: {e}", e.instance_path())).collect();
        assert!(errors.is_empty(), "{what}: {errors:#?}\n{instance:#}");
    }

    /// Checks an answer: the status is listed, the media type too, and the body is of its schema.
    fn check(&mut self, method: &str, path: &str, answer: &Response<Bytes>) {
        let status = answer.status().as_u16();
        let what = format!("{method} {path} -> {status} {}", String::from_utf8_lossy(answer.body()));
        let operation = &self.document["paths"][path][method.to_lowercase()];
        let listed = operation["responses"]
            .get(status.to_string())
            .unwrap_or_else(|| panic!("{what}: not in the file"));
        let content = self.follow(listed)["content"].as_object().unwrap();
        let media = answer.headers()["content-type"].to_str().unwrap();
        let media = media.split(';').next().unwrap();
        let schema =
            &content.get(media).unwrap_or_else(|| panic!("{what}: {media} is not in the file"))["schema"];
        match media {
            "application/json" => {
                self.validate(schema, &serde_json::from_slice(answer.body()).unwrap(), &what)
            }
            "application/jsonl" => {
                for line in answer.body().split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                    self.validate(schema, &serde_json::from_slice(line).unwrap(), &what);
                }
            }
            "text/plain" => {
                self.validate(
                    schema,
                    &Value::from(String::from_utf8(answer.body().to_vec()).unwrap()),
                    &what,
                );
            }
            other => panic!("{what}: no check for {other}"),
        }
        self.seen.insert((method.to_owned(), path.to_owned(), status));
    }

    /// Sends a request and checks its answer, which must have `status`.
    async fn call(
        &mut self,
        client: &Client,
        method: &str,
        path: &str,
        body: Option<&Value>,
        status: u16,
    ) -> Value {
        let media = body.map(|_| "application/json");
        let bytes = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
        let method_ = Method::from_bytes(method.as_bytes()).unwrap();
        let answer = client.raw(method_, path, media, bytes).await.unwrap();
        self.check(method, path, &answer);
        let said = String::from_utf8_lossy(answer.body());
        assert_eq!(answer.status().as_u16(), status, "{method} {path}: {said}");
        serde_json::from_str(&said).unwrap_or(Value::Null)
    }

    fn request_schema(&self, method: &str, path: &str) -> Value {
        self.document["paths"][path][method.to_lowercase()]["requestBody"]["content"]["application/json"]["schema"].clone()
    }
}

#[test]
fn the_file_and_the_server_have_the_same_operations() {
    let specification = Specification::load();
    let served = ROUTES.iter().map(|route| (route.method.to_owned(), route.path.to_owned())).collect();
    assert_eq!(specification.operations(), served);
}

#[test]
fn every_schema_is_one_and_every_example_fits() {
    let specification = Specification::load();
    for (name, schema) in specification.document["components"]["schemas"].as_object().unwrap() {
        jsonschema::meta::validate(schema).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    for (path, method) in [("/v1/migration", "post"), ("/v1/vm/snapshot", "post"), ("/v1/vm/balloon", "put")]
    {
        let request =
            &specification.document["paths"][path][method]["requestBody"]["content"]["application/json"];
        for (name, example) in request["examples"].as_object().unwrap() {
            specification.validate(&request["schema"], &example["value"], name);
        }
    }
}

/// Requests that the file's schemas refuse are refused by the server, and the other way round.
#[test]
fn the_server_takes_what_the_file_takes() {
    let specification = Specification::load();
    let schema = json!({
        "components": specification.document["components"],
        "allOf": [specification.request_schema("POST", "/v1/migration")],
    });
    let validator = jsonschema::validator_for(&schema).unwrap();
    for (body, good) in [
        (json!({"to": "x"}), true),
        (json!({"to": "x", "downtime_ms": 1, "bandwidth_bits": null}), true),
        (json!({"to": "x", "downtime_ms": 0}), false),
        (json!({"to": ""}), false),
        (json!({"to": "x", "bandwidth_bits": 0}), false),
        (json!({"to": "x", "speed": 1}), false),
        (json!({}), false),
    ] {
        assert_eq!(validator.is_valid(&body), good, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_answers_as_the_file_says() {
    let mut file = Specification::load();
    let place = Place::new();
    std::fs::create_dir_all(place.path("config/tern")).unwrap();
    std::fs::write(place.path("config/tern/authorized_keys"), place.client(&["identity"]).stdout).unwrap();
    let mut source = place.run("a.sock", "rate=100 ws=8M", &["--balloon", "size=8M"]);
    let (mut destination, ticket) = place.receive("b.sock");
    let (here, there) = (source.client(), destination.client());

    // A VM that runs, and one that is waited for.
    file.call(&here, "GET", "/v1/vm", None, 200).await;
    let waiting = file.call(&there, "GET", "/v1/vm", None, 200).await;
    assert_eq!((&waiting["state"], &waiting["ticket"]), (&json!("receiving"), &json!(ticket)));
    for operation in ["pause", "resume"] {
        file.call(&there, "PUT", &format!("/v1/vm/{operation}"), None, 409).await;
        file.call(&here, "PUT", &format!("/v1/vm/{operation}"), None, 200).await;
    }
    no_migration_yet(&mut file, &[&here, &there]).await;
    bad_bodies(&mut file, &here).await;
    unknown_operations(&file, &here).await;

    snapshots(&mut file, &here, &there, &place).await;
    balloon(&mut file, &here, &there).await;

    // A migration that cannot be: no VM to move, a ticket that is none, a VM that stands still.
    let request = json!({ "to": ticket });
    file.call(&there, "POST", "/v1/migration", Some(&request), 409).await;
    file.call(&here, "POST", "/v1/migration", Some(&json!({"to": "nowhere"})), 400).await;
    file.call(&here, "GET", "/v1/migration", None, 404).await;
    file.call(&here, "PUT", "/v1/vm/pause", None, 200).await;
    file.call(&here, "POST", "/v1/migration", Some(&request), 409).await;
    file.call(&here, "PUT", "/v1/vm/resume", None, 200).await;

    let nobody = json!({ "to": format!("127.0.0.1:9#{}", &ticket[ticket.len() - 64..]) });
    let forecast = dry_run(&mut file, &here, &there, [&request, &nobody]).await;

    // One that is cancelled, and what is refused meanwhile.
    let events = tokio::spawn({
        let here = here.clone();
        async move { here.raw(Method::GET, "/v1/events", None, Bytes::new()).await }
    });
    let slow = json!({ "to": ticket, "downtime_ms": 1, "bandwidth_bits": 100_000 });
    let slow = tokio::spawn({
        let here = here.clone();
        async move {
            here.raw(Method::POST, "/v1/migration", Some("application/json"), Bytes::from(slow.to_string()))
                .await
        }
    });
    while file.call(&here, "GET", "/v1/vm", None, 200).await["state"] != "migrating" {}
    file.call(&here, "PUT", "/v1/vm/stop", None, 409).await;
    file.call(&here, "GET", "/v1/migration", None, 200).await;
    file.call(&here, "GET", "/v1/metrics", None, 200).await;
    file.call(&here, "DELETE", "/v1/migration", None, 200).await;
    let cancelled = slow.await.unwrap().unwrap();
    file.check("POST", "/v1/migration", &cancelled);
    assert_eq!(cancelled.status(), 409);

    // One that fails: nobody listens there. And one that completes.
    file.call(&here, "POST", "/v1/migration", Some(&nobody), 502).await;
    let report = file.call(&here, "POST", "/v1/migration", Some(&request), 200).await;
    assert_eq!((&report["outcome"], &report["verified"]), (&json!("completed"), &json!(true)));
    assert_eq!(report["forecast"], forecast, "what the dry run had said");
    assert!(source.wait().success());
    let events = events.await.unwrap().unwrap();
    file.check("GET", "/v1/events", &events);
    let events = String::from_utf8_lossy(events.body()).into_owned();
    for kind in ["state", "progress", "migration_failed", "report"] {
        assert!(events.contains(&format!("\"event\":\"{kind}\"")), "no {kind} in {events}");
    }

    let arrived = file.call(&there, "GET", "/v1/vm", None, 200).await;
    assert_eq!((&arrived["state"], &arrived["ticket"]), (&json!("running"), &Value::Null));
    assert_eq!(arrived["balloon"]["target_bytes"], json!(64 << 20), "it moves with the VM");
    file.call(&there, "GET", "/v1/metrics", None, 200).await;
    file.call(&there, "PUT", "/v1/vm/stop", None, 200).await;
    assert!(destination.wait().success());

    let seen = file.seen.iter().filter(|(_, _, status)| *status < 300);
    let seen: BTreeSet<_> = seen.map(|(method, path, _)| (method.clone(), path.clone())).collect();
    // A resolve that succeeds needs a VM in doubt, which takes a process killed between two messages: the end-to-end tests have that.
    let missing: Vec<_> = file.operations().difference(&seen).cloned().collect();
    assert_eq!(missing, [("POST".to_owned(), "/v1/migration/resolve".to_owned())]);
}

/// What a migration would cost: of no VM, to nowhere, to where nobody is, and to the one that waits.
async fn dry_run(
    file: &mut Specification,
    here: &Client,
    there: &Client,
    [request, nobody]: [&Value; 2],
) -> Value {
    let path = "/v1/migration/dry-run";
    file.call(there, "POST", path, Some(request), 409).await;
    file.call(here, "POST", path, Some(&json!({"to": "nowhere"})), 400).await;
    file.call(here, "POST", path, Some(nobody), 502).await;
    file.call(here, "POST", path, Some(request), 200).await
}

/// Of a VM that runs, of one that is paused, and where there can be none.
async fn snapshots(file: &mut Specification, here: &Client, there: &Client, place: &Place) {
    let path = "/v1/vm/snapshot";
    let to = place.path("snapshots").to_str().unwrap().to_owned();
    let named = json!({ "to": to, "name": "first" });
    file.call(there, "POST", path, Some(&named), 409).await;
    let report = file.call(here, "POST", path, Some(&named), 200).await;
    assert_eq!((&report["to"], &report["name"]), (&json!(to), &json!("first")));
    let taken = file.call(here, "POST", path, Some(&named), 409).await;
    assert_eq!(taken["error"]["code"], "name_taken");
    file.call(here, "PUT", "/v1/vm/pause", None, 200).await;
    let report = file.call(here, "POST", path, Some(&json!({ "to": to })), 200).await;
    assert_eq!((&report["name"], &report["pause_ms"]), (&json!("1"), &json!(0.0)));
    file.call(here, "PUT", "/v1/vm/resume", None, 200).await;
    for bad in [json!({ "to": "here" }), json!({ "to": to, "name": "a/b" }), json!({ "to": to, "name": "" })]
    {
        let refused = file.call(here, "POST", path, Some(&bad), 400).await;
        assert_eq!(refused["error"]["code"], "bad_request", "{bad}");
        let schema = file.request_schema("POST", path);
        let schema = json!({ "components": file.document["components"], "allOf": [schema] });
        assert!(!jsonschema::validator_for(&schema).unwrap().is_valid(&bad), "{bad}");
    }
    let file_in_the_way = place.path("file");
    std::fs::write(&file_in_the_way, "").unwrap();
    let refused = file.call(here, "POST", path, Some(&json!({ "to": file_in_the_way })), 500).await;
    assert_eq!(refused["error"]["code"], "io");
}

/// Of a VM of 64 MiB that was launched with one of 8 MiB, and where there is no VM.
async fn balloon(file: &mut Specification, here: &Client, there: &Client) {
    let path = "/v1/vm/balloon";
    let launched = file.call(here, "GET", "/v1/vm", None, 200).await;
    assert_eq!(launched["balloon"], json!({ "target_bytes": 8 << 20, "actual_bytes": 0 }));
    for (size_bytes, good) in
        [(0, true), (4096, true), (1, false), ((64 << 20) + 4096, false), (64 << 20, true)]
    {
        let status = if good { 200 } else { 400 };
        let answer = file.call(here, "PUT", path, Some(&json!({ "size_bytes": size_bytes })), status).await;
        if good {
            assert_eq!(answer["balloon"]["target_bytes"], size_bytes);
        } else {
            assert_eq!(answer["error"]["code"], "bad_request");
        }
    }
    let refused = file.call(there, "PUT", path, Some(&json!({ "size_bytes": 0 })), 409).await;
    assert_eq!(refused["error"]["code"], "wrong_state");
}

async fn no_migration_yet(file: &mut Specification, clients: &[&Client]) {
    for client in clients {
        file.call(client, "GET", "/v1/metrics", None, 200).await;
        file.call(client, "GET", "/v1/migration", None, 404).await;
        file.call(client, "DELETE", "/v1/migration", None, 404).await;
        for run_here in [true, false] {
            let body = json!({ "run_here": run_here });
            file.call(client, "POST", "/v1/migration/resolve", Some(&body), 409).await;
        }
    }
}

async fn bad_bodies(file: &mut Specification, client: &Client) {
    for (method, path) in [
        (Method::POST, "/v1/migration"),
        (Method::POST, "/v1/migration/resolve"),
        (Method::POST, "/v1/vm/snapshot"),
        (Method::PUT, "/v1/vm/balloon"),
    ] {
        for (media, body, status) in [
            (Some("application/json"), "{".to_owned(), 400),
            (Some("application/json"), "[]".to_owned(), 400),
            (Some("application/json"), r#"{"to":"x","run_here":true,"more":1}"#.to_owned(), 400),
            (Some("application/json"), format!("\"{}\"", "x".repeat(20_000)), 413),
            (Some("text/plain"), "{}".to_owned(), 415),
            (None, "{}".to_owned(), 415),
        ] {
            let answer = client.raw(method.clone(), path, media, Bytes::from(body.clone())).await.unwrap();
            file.check(method.as_str(), path, &answer);
            assert_eq!(answer.status(), status, "{path} {body:.60}");
        }
    }
    for body in
        [json!({"to": ""}), json!({"to": "x", "downtime_ms": 0}), json!({"to": "x", "bandwidth_bits": 0})]
    {
        file.call(client, "POST", "/v1/migration", Some(&body), 400).await;
    }
}

async fn unknown_operations(file: &Specification, client: &Client) {
    let error = json!({"$ref": "#/components/schemas/Error"});
    for (method, path, status, code) in [
        (Method::GET, "/", 404, "not_found"),
        (Method::GET, "/v1/vm/", 404, "not_found"),
        (Method::GET, "/v2/vm", 404, "not_found"),
        (Method::PATCH, "/v1/vm", 405, "method_not_allowed"),
        (Method::POST, "/v1/vm/pause", 405, "method_not_allowed"),
        (Method::PUT, "/v1/migration", 405, "method_not_allowed"),
    ] {
        let answer = client.raw(method, path, None, Bytes::new()).await.unwrap();
        assert_eq!(answer.status(), status, "{path}");
        let body: Value = serde_json::from_slice(answer.body()).unwrap();
        file.validate(&error, &body, path);
        assert_eq!(body["error"]["code"], code);
    }
}
