from maxtext.decode import main

raise SystemExit(main())
