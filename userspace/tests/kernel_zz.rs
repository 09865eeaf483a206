mod world;
use std::time::Instant;
use world::*;
#[test]
fn measure() {
    let world = World::new();
    let s = Instant::now();
    let k = warren::kernel::Kernel::open(&world.config).unwrap();
    println!("fresh open {:?}", s.elapsed());
    let s = Instant::now();
    let k2 = warren::kernel::Kernel::open(&world.config).unwrap();
    println!("second open {:?}", s.elapsed());
    drop(k2);
    let n = k.number_for(world.a.cookie()).unwrap();
    k.set_policy(n, &PERMISSIVE).unwrap();
    for _ in 0..3 {
        let s = Instant::now();
        k.attach_pod(n, &world.a).unwrap();
        println!("attach {:?}", s.elapsed());
    }
    let s = Instant::now();
    for _ in 0..50 {
        k.attach_pod(n, &world.a).unwrap();
    }
    println!("attach mean {:?}", s.elapsed() / 50);
    let w: std::collections::HashMap<std::net::IpAddr, _> = (0..60000u32)
        .map(|i| {
            (
                std::net::Ipv4Addr::from(0x0a000000 + i).into(),
                warren::kernel::WorkloadEntry::IN_MESH,
            )
        })
        .collect();
    let s = Instant::now();
    k.sync_workloads(&w).unwrap();
    println!("60k workloads {:?}", s.elapsed());
    let s = Instant::now();
    k.sync_workloads(&w).unwrap();
    println!("again {:?}", s.elapsed());
    let s = Instant::now();
    let _k2 = warren::kernel::Kernel::open(&world.config).unwrap();
    println!("open with 60k {:?}", s.elapsed());
}
