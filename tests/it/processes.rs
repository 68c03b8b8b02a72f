//! Nodes as real processes: what only `kill` can do to them.

use rustix::process::Signal;
use serde_json::json;
use stockade::clock;

use super::{
    selling::{OrderRow, assert_replays, stored},
    support::{
        app::{App, id, insist, send},
        process::Served,
    },
};

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
