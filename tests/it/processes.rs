//! Nodes as real processes: what only `kill` can do to them.

use std::{collections::BTreeMap, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use reqwest::{Client, Method};
use rustix::process::Signal;
use serde_json::{Value, json};
use stockade::{
    auth::{
        Role,
        token::{Identity, Secret, TokenKeys},
    },
    clock,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    faults::{Crowd, assert_sold, drop_of},
    selling::{OrderRow, assert_replays, stored, strangers},
    support::{
        app::{App, PATIENCE, SECRET, id, insist, send},
        process::{Machine, Served},
        shim::Shim,
    },
};

/// Subscribers to the live stock while nodes are restarted.
const SUBSCRIBERS: usize = 1_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_stopped_killed_and_started_again_and_its_acceptance_stays() {
    let mut app = App::without_node(&[]).await;
    let mut node = Served::start(&app).await;
    app.speak_to(node.url());
    let sale = app.sale(json!({ "allocation": 1 })).await;
    let sale = id(&sale);
    let purchase = app.purchase(sale, clock::new_id(), "k", r#"{"quantity":1}"#);
    let again = || purchase.try_clone().unwrap();
    let first = send(again()).await.expect(201);

    // One that stands still answers when it goes on.
    node.signal(Signal::STOP);
    let (request, door) = (again(), node.door());
    let waiting = tokio::spawn(async move { insist(request, &[door]).await });
    node.signal(Signal::CONT);
    assert_replays(&waiting.await.unwrap(), &first);

    let pid = node.pid();
    node.kill().await;
    assert!(send_fails(again()).await);
    node.start_again().await;
    assert_ne!(node.pid(), pid);
    app.speak_to(node.url());
    assert_replays(&send(node.ask(again())).await, &first);

    assert_eq!(stored(&app, sale).await, [OrderRow::of(&first.json())]);
    app.finish().await;
    assert!(node.stop().await.success());
}

async fn send_fails(request: reqwest::RequestBuilder) -> bool {
    request.send().await.is_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_with_wrong_clocks_sell_in_the_same_window() {
    let mut app = App::without_node(&[]).await;
    let right = Served::start(&app).await;
    app.speak_to(right.url());
    let mut nodes = vec![(right, 0)];
    let mut shims = Vec::new();
    for hours in [-1, 1] {
        let shim = Shim::new();
        shim.set_clock_ahead(hours * 3_600_000);
        let machine = Machine {
            environment: shim.environment(),
            ..Machine::default()
        };
        nodes.push((Served::start_on(&app, machine).await, hours));
        shims.push(shim);
    }
    let opens_at = clock::now() + TimeDelta::milliseconds(1_500);
    let closes_at = opens_at + TimeDelta::milliseconds(1_500);
    let sale = app
        .sale(json!({
            "allocation": 1_000_000, "per_buyer_limit": 1,
            "opens_at": opens_at, "closes_at": closes_at,
        }))
        .await;
    let sale = id(&sale).to_owned();
    let secret = Secret {
        id: "1",
        bytes: SECRET.as_bytes(),
    };
    let keys = TokenKeys::new(&[secret], 600).unwrap();
    // Each node takes the tokens of its own time; that is all that its clock is good for.
    let asking = nodes.iter().map(async |(node, hours)| {
        let mut turns: Vec<String> = Vec::new();
        let mut accepted = Vec::new();
        while turns.last().is_none_or(|last| last != "closed") {
            let identity = Identity {
                user: clock::new_id(),
                role: Role::Buyer,
                session: None,
                registered_at: None,
            };
            let there = clock::now() + TimeDelta::hours(*hours);
            let token = keys.mint(identity, clock::new_id(), there).unwrap();
            let request = app
                .client
                .post(format!("{}/v1/sales/{sale}/orders", node.url()))
                .bearer_auth(token)
                .header("Idempotency-Key", "k")
                .json(&json!({ "quantity": 1 }));
            let answer = send(request).await;
            let turn = match answer.status.as_u16() {
                201 => {
                    accepted.push(answer.json());
                    "201".to_owned()
                }
                _ => answer.json()["code"].as_str().unwrap().to_owned(),
            };
            // What a node has just been told of a sale that has just been made.
            if turn != "not_found" && turns.last() != Some(&turn) {
                turns.push(turn);
            }
        }
        (turns, accepted)
    });
    let seen = timeout(PATIENCE, futures::future::join_all(asking))
        .await
        .unwrap();
    let mut rows = Vec::new();
    for (turns, accepted) in seen {
        assert_eq!(turns, ["not_open", "201", "closed"]);
        for body in &accepted {
            let at: DateTime<Utc> = body["accepted_at"].as_str().unwrap().parse().unwrap();
            assert!(
                opens_at - at < TimeDelta::milliseconds(1) && at < closes_at,
                "{body}"
            );
        }
        rows.extend(accepted.iter().map(OrderRow::of));
    }
    rows.sort_by_key(|row| row.seq);
    assert_eq!(stored(&app, &sale).await, rows);
    app.finish().await;
    for (mut node, _) in nodes {
        assert!(node.stop().await.success());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_node_keeps_files_for_its_stores_and_sells_on_when_somebody_leaves() {
    let mut app = App::without_node(&[]).await;
    let machine = Machine {
        open_files: Some(256),
        ..Machine::default()
    };
    let mut small = Served::start_on(&app, machine).await;
    let mut node = Served::start(&app).await;
    app.speak_to(node.url());
    let sale = drop_of(&app, 60).await;
    let pid = small.pid();
    let open = format!("/proc/{}/fd", pid.unwrap());
    let files = || std::fs::read_dir(&open).unwrap().count();
    let before = files();
    // More than it holds; the kernel takes them for it.
    let address = small.url();
    let address = address.strip_prefix("http://").unwrap();
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(tokio::net::TcpStream::connect(address).await.unwrap());
    }
    let full = async {
        // Half of its files; some of its own may have been closed since.
        while files() < before + 120 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, full).await.unwrap();
    // Who gets no answer there asks elsewhere, with the same key.
    let (requests, doors) = (strangers(&app, &sale, 40), vec![small.door(), node.door()]);
    let requests = requests
        .into_iter()
        .map(|request| request.timeout(Duration::from_secs(2)));
    let mut answers = Crowd::send(requests.collect(), doors).done().await;
    let full = files();
    assert!(full < 250, "{full} files are open, and 256 may be");
    drop(idle);
    let requests = strangers(&app, &sale, 40);
    let there = Crowd::send(requests, vec![small.door()]);
    answers.extend(there.done().await);
    assert_eq!(small.pid(), pid, "it has ended");
    assert_sold(&app, &sale, &answers, 60).await;
    app.finish().await;
    assert!(small.stop().await.success());
    assert!(node.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_as_many_streams_as_it_may_have_still_sells() {
    let mut app = App::without_node(&[]).await;
    let machine = Machine {
        open_files: Some(256),
        ..Machine::default()
    };
    let mut node = Served::start_on(&app, machine).await;
    app.speak_to(node.url());
    let sale = drop_of(&app, 60).await;
    let path = format!("/v1/sales/{sale}/events");
    let mut streams = Vec::new();
    let refusal = loop {
        let response = app.request(Method::GET, &path).send().await.unwrap();
        if response.status() != 200 {
            break response;
        }
        streams.push(response);
        assert!(streams.len() < 256);
    };
    assert!(streams.len() > 100, "{}", streams.len());
    assert_eq!(refusal.status(), 503);
    assert!(refusal.headers().contains_key("retry-after"));
    let refusal: Value = refusal.json().await.unwrap();
    assert_eq!(refusal["code"], "unavailable");
    // One after the other: few connections are left.
    let mut answers = Vec::new();
    for request in strangers(&app, &sale, 60) {
        let buying = Crowd::send(vec![request], vec![node.door()]);
        answers.extend(buying.done().await);
    }
    assert_sold(&app, &sale, &answers, 60).await;
    // Everybody sees it, and whoever leaves makes room.
    for stream in &mut streams {
        let mut text = String::new();
        while !text.contains("\"sold_out\":true") {
            let piece = timeout(PATIENCE, stream.chunk()).await.unwrap();
            text.push_str(std::str::from_utf8(&piece.unwrap().unwrap()).unwrap());
        }
    }
    streams.clear();
    let room = async {
        while app
            .request(Method::GET, &path)
            .send()
            .await
            .unwrap()
            .status()
            != 200
        {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, room).await.unwrap();
    app.finish().await;
    assert!(node.stop().await.success());
}

/// How one stream ended.
enum Ended {
    /// In order, with this many milliseconds to wait before the next one.
    Retry(u64),
    /// It has shown that the sale is sold out.
    SoldOut,
}

/// Reads a stream to its end, and says when it has shown its first value.
async fn follow(client: &Client, url: &str, connected: &mpsc::Sender<()>) -> Option<Ended> {
    let mut response = client.get(url).send().await.ok()?;
    if response.status() != 200 {
        return None;
    }
    let (mut text, mut retry, mut seen) = (String::new(), None, false);
    loop {
        let piece = timeout(PATIENCE, response.chunk()).await.unwrap();
        // A stream that breaks instead of ending is one that was not told to come again.
        let Some(piece) = piece.unwrap() else {
            assert_eq!(text, "", "the stream ends between events");
            return Some(Ended::Retry(retry.unwrap()));
        };
        text.push_str(std::str::from_utf8(&piece).unwrap());
        while let Some((said, rest)) = text.split_once("\n\n") {
            let said = said.to_owned();
            text = rest.to_owned();
            retry = said.strip_prefix("retry: ").map(|ms| ms.parse().unwrap());
            if let Some((_, data)) = said.split_once("\ndata: ") {
                let data: Value = serde_json::from_str(data).unwrap();
                if !seen {
                    seen = true;
                    connected.send(()).await.unwrap();
                }
                if data["sold_out"] == true {
                    return Some(Ended::SoldOut);
                }
            }
        }
    }
}

/// Follows a sale until it is sold out, at whichever node there is. Gives what each stream that
/// ended told it to wait.
async fn subscribe(
    client: Client,
    path: String,
    mut doors: Vec<watch::Receiver<String>>,
    connected: mpsc::Sender<()>,
) -> Vec<u64> {
    let mut retries = Vec::new();
    loop {
        let url = format!("{}{path}", doors[0].borrow().clone());
        match follow(&client, &url, &connected).await {
            Some(Ended::SoldOut) => return retries,
            Some(Ended::Retry(ms)) => {
                retries.push(ms);
                // A tenth of what a browser would wait.
                sleep(Duration::from_millis(ms / 10)).await;
            }
            None => sleep(Duration::from_millis(20)).await,
        }
        doors.rotate_left(1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_loses_no_acceptance_and_every_stream_comes_back() {
    let mut app = App::without_node(&[]).await;
    let mut nodes = [Served::start(&app).await, Served::start(&app).await];
    app.speak_to(nodes[0].url());
    let sale = drop_of(&app, 300).await;
    let doors = [nodes[0].door(), nodes[1].door()];
    let (connected, mut arrivals) = mpsc::channel(SUBSCRIBERS);
    let mut subscribers = JoinSet::new();
    for n in 0..SUBSCRIBERS {
        let mut doors = doors.to_vec();
        doors.rotate_left(n % 2);
        let path = format!("/v1/sales/{sale}/events");
        subscribers.spawn(subscribe(
            app.client.clone(),
            path,
            doors,
            connected.clone(),
        ));
    }
    let mut all_arrive = async |count| {
        for _ in 0..count {
            timeout(PATIENCE, arrivals.recv()).await.unwrap().unwrap();
        }
    };
    all_arrive(SUBSCRIBERS).await;

    let mut buying = Crowd::send(strangers(&app, &sale, 200), doors.to_vec());
    buying.served(30).await;
    assert!(nodes[0].stop().await.success());
    // They are at the other node now, and it sells.
    all_arrive(SUBSCRIBERS / 2).await;
    nodes[0].start_again().await;
    app.speak_to(nodes[0].url());
    let mut answers = buying.done().await;
    let mut buying = Crowd::send(strangers(&app, &sale, 50), doors.to_vec());
    buying.served(10).await;
    assert!(nodes[1].stop().await.success());
    all_arrive(SUBSCRIBERS).await;
    nodes[1].start_again().await;
    answers.extend(buying.done().await);
    let requests = strangers(&app, &sale, 100);
    answers.extend(Crowd::send(requests, doors.to_vec()).done().await);

    // Nobody came back more often than nodes were stopped, and not all at once.
    let retries: Vec<_> = timeout(PATIENCE, subscribers.join_all()).await.unwrap();
    let mut moments = BTreeMap::<u64, usize>::new();
    for ms in retries.iter().flatten() {
        assert!((2_000..=8_000).contains(ms), "{ms}");
        *moments.entry(ms / 1_000).or_default() += 1;
    }
    assert!(retries.iter().all(|retries| retries.len() <= 2));
    let most = moments.values().max().unwrap();
    let all: usize = moments.values().sum();
    assert!(all >= SUBSCRIBERS * 3 / 2 && *most < all / 3, "{moments:?}");

    assert_sold(&app, &sale, &answers, 300).await;
    app.finish().await;
    for node in &mut nodes {
        assert!(node.stop().await.success());
    }
}
