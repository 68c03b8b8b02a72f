//! Live stock, as a crowd of subscribers sees it.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use chrono::{SecondsFormat, TimeDelta};
use reqwest::{Method, Response};
use serde_json::{Value, json};
use stockade::clock;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use uuid::Uuid;

use super::support::app::{App, PATIENCE, id, send};

/// One thing that a stream said.
#[derive(Clone, Debug, PartialEq)]
enum Said {
    Retry(u64),
    Heartbeat,
    Event(Event),
}

#[derive(Clone, Debug, PartialEq)]
struct Event {
    name: String,
    id: String,
    data: Value,
}

impl Event {
    fn sale(&self) -> &str {
        self.data["sale_id"].as_str().unwrap()
    }
}

/// A subscriber. It checks what must hold of every stream while it reads.
struct Subscriber {
    response: Response,
    text: String,
    /// The last id of each sale.
    ids: Vec<(String, String)>,
}

impl Subscriber {
    async fn connect(app: &App, path: &str, last_event_id: Option<&str>) -> Self {
        let mut request = app.request(Method::GET, path);
        if let Some(id) = last_event_id {
            request = request.header("Last-Event-ID", id);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        for (name, value) in [
            ("content-type", "text/event-stream"),
            ("cache-control", "no-store"),
            ("x-accel-buffering", "no"),
        ] {
            assert_eq!(response.headers()[name], value);
        }
        let mut subscriber = Self {
            response,
            text: String::new(),
            ids: Vec::new(),
        };
        let first = subscriber.next().await;
        assert!(
            matches!(first, Some(Said::Retry(2_000..=8_000))),
            "{first:?}"
        );
        subscriber
    }

    /// The next thing; `None` at the end of the stream.
    async fn next(&mut self) -> Option<Said> {
        loop {
            if let Some((said, rest)) = self.text.split_once("\n\n") {
                let (said, rest) = (said.to_owned(), rest.to_owned());
                self.text = rest;
                return Some(self.parse(&said));
            }
            let piece = timeout(PATIENCE, self.response.chunk()).await.unwrap();
            let Some(piece) = piece.unwrap() else {
                assert_eq!(self.text, "", "the stream ends between events");
                return None;
            };
            self.text.push_str(std::str::from_utf8(&piece).unwrap());
        }
    }

    fn parse(&mut self, said: &str) -> Said {
        let lines: Vec<_> = said.lines().collect();
        let (name, id, data) = match lines[..] {
            [":"] => return Said::Heartbeat,
            [retry] => {
                let ms = retry.strip_prefix("retry: ").unwrap();
                return Said::Retry(ms.parse().unwrap());
            }
            [name, id, data] => (name, id, data),
            _ => panic!("{said}"),
        };
        let event = Event {
            name: name.strip_prefix("event: ").unwrap().to_owned(),
            id: id.strip_prefix("id: ").unwrap().to_owned(),
            data: serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap(),
        };
        let number = |name: &str| event.data[name].as_u64().unwrap();
        let places = number("remaining") + number("held") + number("sold");
        assert_eq!(places, number("allocation"), "{event:?}");
        assert_eq!(
            event.data["sold_out"],
            number("remaining") == 0,
            "{event:?}"
        );
        let before = self.ids.iter_mut().find(|(sale, _)| sale == event.sale());
        match before {
            Some((_, before)) => {
                assert!(*before < event.id, "{before} before {event:?}");
                assert_ne!(event.name, "snapshot");
                before.clone_from(&event.id);
            }
            None => {
                assert_eq!(event.name, "snapshot");
                self.ids.push((event.sale().to_owned(), event.id.clone()));
            }
        }
        Said::Event(event)
    }

    async fn event(&mut self) -> Event {
        loop {
            match self.next().await {
                Some(Said::Event(event)) => return event,
                Some(Said::Heartbeat) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Reads until an event is as wanted; gives it and those before it.
    async fn until(&mut self, wanted: impl Fn(&Event) -> bool) -> Vec<Event> {
        let mut events = Vec::new();
        loop {
            events.push(self.event().await);
            if events.last().is_some_and(&wanted) {
                return events;
            }
        }
    }
}

fn buyer(number: u128) -> Uuid {
    Uuid::from_u128(0xb0_0000 + number)
}

fn in_ms(ms: i64) -> String {
    (clock::now() + TimeDelta::milliseconds(ms)).to_rfc3339_opts(SecondsFormat::Millis, true)
}

async fn control(app: &App, sale: &str, what: &str) {
    let path = format!("/v1/sales/{sale}/{what}");
    send(app.operate(Method::POST, &path)).await.expect(200);
}

/// Connects until there is nothing fresh to show. A stream is dropped, not read to its end.
async fn refused(app: &App, path: &str) {
    let connecting = async {
        loop {
            let response = app.request(Method::GET, path).send().await.unwrap();
            if response.status() != 200 {
                return response;
            }
        }
    };
    let response = timeout(PATIENCE, connecting).await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    let problem: Value = response.json().await.unwrap();
    assert_eq!(problem["code"], "unavailable");
}

/// A metric's value.
async fn metric(app: &App, name: &str) -> f64 {
    let metrics = app.get("/metrics").await.expect(200).text;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_subscriber_sees_a_sale_sell_out_at_a_cost_of_ten_frames_a_second() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 300, "per_buyer_limit": 1 }))
        .await;
    let path = format!("/v1/sales/{}/events", id(&sale));
    let mut subscribers = Vec::new();
    for _ in 0..20 {
        let mut subscriber = Subscriber::connect(&app, &path, None).await;
        let snapshot = subscriber.event().await;
        assert_eq!(snapshot.data["remaining"], 300);
        assert_eq!(snapshot.data["state"], "open");
        assert_eq!(snapshot.data["seq"], 0);
        subscribers.push(subscriber);
    }
    assert!((metric(&app, "stockade_realtime_subscribers").await - 20.0).abs() < 0.5);

    let began = Instant::now();
    let crowd = async {
        for chunk in 0..30 {
            let buys = (0..12).map(|n| app.buy(id(&sale), buyer(chunk * 12 + n), "k", 1));
            futures::future::join_all(buys).await;
        }
    };
    let watching = subscribers.iter_mut().map(async |subscriber| {
        subscriber
            .until(|event| event.data["sold_out"] == true)
            .await
    });
    let ((), seen) = tokio::join!(crowd, futures::future::join_all(watching));
    // One frame for each 100 ms that has passed, and one that was due at once.
    let frames_max = began.elapsed().as_millis() / 100 + 1;
    for events in &seen {
        assert!(events.len() as u128 <= frames_max, "{events:#?}");
        let (last, before) = events.split_last().unwrap();
        assert_eq!(
            (last.name.as_str(), &last.data["seq"]),
            ("state", &json!(300))
        );
        for event in before {
            assert_eq!(event.name, "stock", "{event:?}");
        }
    }

    // A unit comes back.
    let first = app
        .buy(id(&sale), buyer(0), "k", 1)
        .await
        .expect(201)
        .json();
    let cancel = format!("/v1/orders/{}/cancel", id(&first));
    send(app.operate(Method::POST, &cancel)).await.expect(200);
    for subscriber in &mut subscribers {
        let event = subscriber.event().await;
        assert_eq!(
            (event.name.as_str(), &event.data["remaining"]),
            ("state", &json!(1))
        );
    }

    // Whoever comes back does not see less than before, and nobody watched leaves nothing behind.
    let last = subscribers[0].ids[0].1.clone();
    let mut again = Subscriber::connect(&app, &path, Some(&last)).await;
    assert!(again.event().await.id >= last);
    drop((again, subscribers));
    let quiet = |name: &'static str| {
        app.until("/metrics", move |answer| {
            answer.text.contains(&format!("{name} 0\n"))
        })
    };
    quiet("stockade_realtime_subscribers").await;
    quiet("stockade_realtime_watched_sales").await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_the_sale_and_whoever_does_not_read_misses_steps_but_not_the_end() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 30, "per_buyer_limit": 3 }))
        .await;
    app.buy(id(&sale), buyer(0), "k", 3).await.expect(201);
    let path = format!("/v1/sales/{}/events", id(&sale));
    let mut reader = Subscriber::connect(&app, &path, None).await;
    let mut sleeper = Subscriber::connect(&app, &path, None).await;
    let snapshot = reader.event().await;
    let view = app.view(id(&sale)).await;
    for (name, value) in snapshot.data.as_object().unwrap() {
        let expected = match name.as_str() {
            "server_time_ms" => continue,
            "sale_id" => &view["id"],
            name => &view[name],
        };
        assert_eq!(value, expected, "{name}");
    }
    let names: BTreeSet<_> = snapshot.data.as_object().unwrap().keys().collect();
    let expected = "allocation closes_at held opens_at remaining round sale_id seq server_time_ms \
                    sold sold_out state";
    assert!(names.into_iter().eq(expected.split(' ')));

    let mut left = 27;
    for number in 1..=9 {
        app.buy(id(&sale), buyer(number), "k", 3).await.expect(201);
        let events = reader
            .until(|event| event.data["seq"] == json!(number + 1))
            .await;
        for event in events {
            let remaining = event.data["remaining"].as_u64().unwrap();
            assert!(remaining < left, "{event:?}");
            left = remaining;
        }
    }
    assert_eq!(left, 0);
    let slept = sleeper.until(|event| event.data["sold_out"] == true).await;
    assert_eq!(slept[0].id, snapshot.id);
    assert_eq!(sleeper.ids, reader.ids);
    app.finish().await;
}

/// A connection without any help.
struct Plain {
    socket: TcpStream,
    text: String,
}

impl Plain {
    /// Connects. So many bytes that nobody has read may wait on this side.
    async fn connect(app: &App, unread: u32) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(unread).unwrap();
        let address = app.door().borrow().strip_prefix("http://").unwrap().parse();
        let socket = socket.connect(address.unwrap()).await.unwrap();
        let text = String::new();
        Self { socket, text }
    }

    async fn say(&mut self, request: &str) {
        self.socket.write_all(request.as_bytes()).await.unwrap();
    }

    /// Everything up to and including `what`.
    async fn until(&mut self, what: &str) -> String {
        loop {
            if let Some(at) = self.text.find(what) {
                let rest = self.text.split_off(at + what.len());
                return std::mem::replace(&mut self.text, rest);
            }
            let mut buffer = [0; 4096];
            let read = timeout(PATIENCE, self.socket.read(&mut buffer)).await;
            let read = read.unwrap().unwrap();
            assert!(read > 0, "the end instead of {what} after {}", self.text);
            self.text
                .push_str(std::str::from_utf8(&buffer[..read]).unwrap());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_an_answer_like_any_other() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    let path = format!("/v1/sales/{}/events", id(&sale));
    let mut kept = Plain::connect(&app, 65_536).await;
    // Two requests at once, as a browser's connection may have them.
    kept.say(&format!(
        "GET /livez HTTP/1.1\r\nhost: a\r\n\r\nGET {path} HTTP/1.1\r\nhost: a\r\n\r\n"
    ))
    .await;
    let livez = kept.until("\r\n\r\n").await;
    assert!(livez.starts_with("HTTP/1.1 200 OK\r\n"), "{livez}");
    kept.until("HTTP/1.1 200 OK\r\n").await;
    let head = kept.until("\r\n\r\n").await;
    for header in [
        "date: ",
        "x-request-id: ",
        "x-content-type-options: nosniff",
        "content-type: text/event-stream",
        "transfer-encoding: chunked",
    ] {
        assert!(head.contains(header), "{head}");
    }
    assert_eq!(head.matches("transfer-encoding").count(), 1);
    assert!(!head.contains("content-length"), "{head}");
    let snapshot = kept.until("}\n\n\r\n").await;
    let chunk = snapshot.split_once("\n\n\r\n").unwrap().1;
    let (length, event) = chunk.split_once("\r\n").unwrap();
    assert_eq!(
        usize::from_str_radix(length, 16),
        Ok(event.len() - "\r\n".len())
    );
    assert!(event.starts_with("event: snapshot\n"), "{event}");

    // There were no chunks before 1.1, and HEAD has no body.
    let mut old = Plain::connect(&app, 65_536).await;
    old.say(&format!("GET {path} HTTP/1.0\r\nhost: a\r\n\r\n"))
        .await;
    let head = old.until("\r\n\r\n").await;
    assert!(!head.contains("chunked"), "{head}");
    let begin = old.until("data: ").await;
    assert!(begin.starts_with("retry: "), "{begin}");
    let mut curious = Plain::connect(&app, 65_536).await;
    curious
        .say(&format!(
            "HEAD {path} HTTP/1.1\r\nhost: a\r\n\r\nGET /livez HTTP/1.1\r\nhost: a\r\n\r\n"
        ))
        .await;
    let head = curious.until("\r\n\r\n").await;
    assert!(head.contains("text/event-stream"), "{head}");
    let next = curious.until("\r\n").await;
    assert_eq!(next, "HTTP/1.1 200 OK\r\n");
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_reads_is_not_kept_but_the_last_value_is() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 300, "per_buyer_limit": 1 }))
        .await;
    let path = format!("/v1/sales/{}/events", id(&sale));
    let mut reader = Subscriber::connect(&app, &path, None).await;
    let mut sleeper = Plain::connect(&app, 2_048).await;
    sleeper
        .say(&format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n"))
        .await;
    sleeper.until("}\n\n").await;
    let mut told = 0;
    for number in 0..100 {
        app.buy(id(&sale), buyer(number), "k", 1).await.expect(201);
        let events = reader
            .until(|event| event.data["seq"] == json!(number + 1))
            .await;
        told += events.len();
    }
    let slept = sleeper.until("\"seq\":100,").await;
    let heard = slept.matches("data: ").count();
    assert!(told >= 100 && heard < told * 3 / 4, "{heard} of {told}");
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_follows_the_operator_and_the_clock() {
    let app = App::start().await;
    let opening = app.sale(json!({ "opens_at": in_ms(3_000) })).await;
    let closing = app.sale(json!({ "closes_at": in_ms(4_000) })).await;
    let connect = async |sale: &Value| {
        let path = format!("/v1/sales/{}/events", id(sale));
        Subscriber::connect(&app, &path, None).await
    };
    let (mut opens, mut closes) = (connect(&opening).await, connect(&closing).await);
    let shows = |event: Event| format!("{} {}", event.name, event.data["state"]);
    assert_eq!(shows(opens.event().await), "snapshot \"scheduled\"");
    assert_eq!(shows(closes.event().await), "snapshot \"open\"");
    assert_eq!(shows(opens.event().await), "state \"open\"");
    assert_eq!(shows(closes.event().await), "state \"closed\"");
    for (step, state) in [("pause", "paused"), ("resume", "open"), ("close", "closed")] {
        control(&app, id(&opening), step).await;
        let shown = shows(opens.event().await);
        assert_eq!(shown, format!("state \"{state}\""));
    }
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_stream_has_all_sales_that_are_not_closed() {
    let app = App::start().await;
    let nothing = Subscriber::connect(&app, "/v1/events", None).await;
    let (first, second) = (app.sale(json!({})).await, app.sale(json!({})).await);
    let later = app.sale(json!({ "opens_at": in_ms(600_000) })).await;
    let ended = json!({ "opens_at": in_ms(-60_000), "closes_at": in_ms(-30_000) });
    app.sale(ended).await;

    let mut subscriber = nothing;
    let mut seen = BTreeSet::new();
    while seen.len() < 3 {
        let event = subscriber.event().await;
        assert_eq!(event.name, "snapshot");
        seen.insert(event.sale().to_owned());
    }
    let sales = [&first, &second, &later].map(|sale| id(sale).to_owned());
    assert_eq!(seen, BTreeSet::from(sales));

    app.buy(id(&second), buyer(1), "k", 2).await.expect(201);
    let event = subscriber.event().await;
    assert_eq!((event.name.as_str(), event.sale()), ("stock", id(&second)));
    assert_eq!(event.data["remaining"], 3);

    control(&app, id(&first), "close").await;
    let event = subscriber.event().await;
    assert_eq!((event.name.as_str(), event.sale()), ("state", id(&first)));
    assert_eq!(event.data["state"], "closed");

    let mut newcomer = Subscriber::connect(&app, "/v1/events", None).await;
    let newest = app.sale(json!({})).await;
    for subscriber in [&mut subscriber, &mut newcomer] {
        let events = subscriber.until(|event| event.sale() == id(&newest)).await;
        assert!(
            events.iter().all(|event| event.sale() != id(&first)),
            "{events:#?}"
        );
    }
    drop((subscriber, newcomer));
    app.until("/metrics", |answer| {
        answer.text.contains("stockade_realtime_watched_sales 0\n")
    })
    .await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_outlive_redis_and_go_on_where_they_were() {
    let mut app = App::start().await;
    let sale = app.sale(json!({})).await;
    let opening = app.sale(json!({ "opens_at": in_ms(2_500) })).await;
    let path = |sale: &Value| format!("/v1/sales/{}/events", id(sale));
    let mut one = Subscriber::connect(&app, &path(&sale), None).await;
    let mut all = Subscriber::connect(&app, "/v1/events", None).await;
    let mut scheduled = Subscriber::connect(&app, &path(&opening), None).await;
    let before = one.event().await;
    assert_eq!(scheduled.event().await.data["state"], "scheduled");

    app.redis.server.kill().await;
    for path in [path(&sale), "/v1/events".to_owned()] {
        refused(&app, &path).await;
    }
    app.redis.server.restart().await.unwrap();
    // As a buyer would: the same key, until there is an answer.
    let buying = async { while app.buy(id(&sale), buyer(1), "k", 1).await.status != 201 {} };
    timeout(PATIENCE, buying).await.unwrap();
    for subscriber in [&mut one, &mut all] {
        let events = subscriber
            .until(|event| event.sale() == id(&sale) && event.data["remaining"] == 4)
            .await;
        assert!(events.last().unwrap().id > before.id);
    }
    // Nothing but the clock moves this one.
    scheduled
        .until(|event| event.name == "state" && event.data["state"] == "open")
        .await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_ends_every_stream_with_a_new_retry() {
    let mut app = App::start().await;
    let sale = app.sale(json!({})).await;
    let path = format!("/v1/sales/{}/events", id(&sale));
    let mut streams = vec![
        Subscriber::connect(&app, &path, None).await,
        Subscriber::connect(&app, "/v1/events", None).await,
    ];
    for stream in &mut streams {
        stream.event().await;
    }
    let stopping = Instant::now();
    let ends = streams.iter_mut().map(async |stream| {
        let mut last = None;
        while let Some(said) = stream.next().await {
            last = Some(said);
        }
        (last, stopping.elapsed())
    });
    let ((), ends) = tokio::join!(app.stop(), futures::future::join_all(ends));
    for (last, after) in ends {
        assert!(matches!(last, Some(Said::Retry(2_000..=8_000))), "{last:?}");
        assert!(after < Duration::from_secs(1), "{after:?}");
    }
    app.run().await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn there_are_no_events_of_a_sale_that_does_not_exist() {
    let app = App::start().await;
    for sale in [Uuid::nil().to_string(), "{p0}".to_owned()] {
        let answer = app
            .get(&format!("/v1/sales/{sale}/events"))
            .await
            .expect(404);
        assert_eq!(answer.json()["code"], "not_found");
    }
    app.finish().await;
}

#[tokio::test]
async fn every_subscriber_sees_the_end_of_a_round_and_then_the_next() {
    let app = App::start().await;
    let at = |ms| {
        let at = clock::now() + TimeDelta::milliseconds(ms);
        at.to_rfc3339_opts(SecondsFormat::Millis, true)
    };
    let (end, next) = (at(1_000), at(2_000));
    let sale = app.sale(json!({ "allocation": 5 })).await;
    let body = json!({
        "product_id": sale["product_id"], "allocation": 3, "per_buyer_limit": 2,
        "schedule": { "windows": [
            { "opens_at": at(0), "closes_at": end },
            { "opens_at": end, "closes_at": next },
            { "opens_at": at(2_500), "closes_at": at(60_000) },
        ]},
    });
    let sale = send(app.operate(Method::POST, "/v1/sales").json(&body)).await;
    let sale = sale.expect(201).json();
    let sale = id(&sale).to_owned();
    let path = format!("/v1/sales/{sale}/events");
    let mut streams = [
        Subscriber::connect(&app, &path, None).await,
        Subscriber::connect(&app, "/v1/events", None).await,
    ];
    app.buy(&sale, clock::new_id(), "k", 2).await.expect(201);
    for stream in &mut streams {
        let mut seen = Vec::new();
        let of_sale = async {
            loop {
                let event = stream.event().await;
                if event.sale() != sale {
                    continue;
                }
                let what = (event.data["round"].as_u64(), event.data["state"].clone());
                if seen.last() != Some(&what) {
                    seen.push(what.clone());
                }
                match (what.0, what.1.as_str()) {
                    // The last of a round is not lost.
                    (Some(1), Some("closed")) => assert_eq!(event.data["sold"], 2),
                    (Some(3), Some("open")) => return,
                    _ => {}
                }
            }
        };
        timeout(PATIENCE, of_sale).await.unwrap();
        let expected = [
            (1, "open"),
            (1, "closed"),
            (2, "open"),
            (2, "closed"),
            (3, "scheduled"),
            (3, "open"),
        ];
        let expected = expected.map(|(round, state)| (Some(round), json!(state)));
        assert_eq!(seen, expected);
    }
    app.finish().await;
}
