//! *Health* of the console.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::TcpListener;

use super::{
    console::{Browser, OTHERS, SETTINGS, key},
    history::TOKEN,
};
use crate::support::{
    api::Api,
    daemon::{Setup, subscriber},
    eventually,
    queue::Queue,
    run,
};

static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);

fn connections() -> usize {
    CONNECTIONS.load(Ordering::SeqCst)
}

#[test]
fn an_inspection_is_made_by_a_form_alone_and_not_again_at_each_reload() {
    run(async {
        let receiver = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/", receiver.local_addr().expect("an address"));
        tokio::spawn(async move {
            while receiver.accept().await.is_ok() {
                CONNECTIONS.fetch_add(1, Ordering::SeqCst);
            }
        });
        let api = Api::new();
        let text = api.section()
            + &format!("token = \"{TOKEN}\"\n{OTHERS}")
            + SETTINGS
            + &subscriber("siem", &url, "");
        let setup = Setup::new(&Queue::embedded(), &text);
        let _daemon = setup.start().await;
        // It changes nothing, so that a token may do it that reads.
        let browser = Browser::signed_in(&api, "the-token-that-reads").await;
        let page = browser.page("/console/health").await;
        assert!(page.contains("Not inspected since the daemon started"), "{page}");
        let inspect = "/console/health/inspect";
        assert_eq!(browser.get(inspect).await.header("location"), "/console/health");
        let key = key(&page);
        for (form, headers) in [
            (vec![], vec![]),
            (vec![("form_key", "x")], vec![]),
            (vec![("form_key", key.as_str())], vec![("origin", "https://evil.example")]),
        ] {
            assert_eq!(browser.post(inspect, &form, &headers).await.status, 403, "{form:?}");
        }
        assert_eq!(connections(), 0, "nobody has asked for it");
        for _ in 0..3 {
            let seen = browser.post(inspect, &[("form_key", &key)], &[]).await;
            assert_eq!((seen.status, seen.header("location")), (303, "/console/health"));
            let page = browser.page("/console/health").await;
            assert!(page.contains("endpoint of `siem`") && page.contains("Inspected at"), "{page}");
        }
        eventually("the receiver has seen the connection", async || connections() > 0).await;
        assert_eq!(connections(), 1, "one inspection in half a minute");
    });
}
